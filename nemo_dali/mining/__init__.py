"""Mining: photos and sentences embedded and ranked, the resulting table, and the bounds for drawing from it."""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.mining.exclusions import Exclusions as Exclusions
    from nemo_dali.mining.given import mine_scores as mine_scores
    from nemo_dali.mining.job import mine as mine
    from nemo_dali.mining.table import NegativeTable as NegativeTable

__all__ = ["Exclusions", "NegativeTable", "mine", "mine_scores"]

__getattr__, __dir__ = lazy_names(
    __name__, {"Exclusions": "exclusions", "NegativeTable": "table", "mine": "job", "mine_scores": "given"}
)
