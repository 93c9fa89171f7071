"""The policies of docs/choosing-tau-and-k.md are such."""

import re
from itertools import pairwise

from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.paths import ROOT


def test_the_examples_of_difficulty_by_epoch_do_what_is_said_of_them():
    page = (ROOT / "docs" / "choosing-tau-and-k.md").read_text()
    section = page.split("## Difficulty by epoch\n")[1].split("\n## ")[0]
    code, file = (re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1] for language in ("python", "json"))
    names = {}
    exec(code, names)
    assert [names["policy"].at(epoch).p_mined for epoch in (0, 4, 5, 34, 35, 99)] == [0, 0, 0.5, 0.5, 0, 0]
    harder = [MosaicPolicy.from_json(file).difficulty(epoch) for epoch in range(30)]
    for one, other in pairwise(harder[:21]):
        assert other.max_similarity > one.max_similarity and other.top_k < one.top_k
    assert set(harder[20:]) == {(0.5, 0.0, 100, 0.3, None)}
