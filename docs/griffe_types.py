"""Mends what Griffe makes of the attributes in a docstring.

It shows one that it knows no type of with that of the one before, and of several names on one line ("mean, std: ...")
the second as the type of the first.
"""

from contextlib import suppress
from typing import Any

import griffe


class OwnTypes(griffe.Extension):
    """Every attribute has its own type, or none."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all that Griffe has read."""
        pending: list[griffe.Object] = [pkg]
        while pending:
            one = pending.pop()
            pending += [member for member in one.members.values() if isinstance(member, griffe.Object)]
            for section in one.docstring.parsed if one.docstring else ():
                if section.kind is griffe.DocstringSectionKind.attributes:
                    for attribute in section.value:
                        if attribute.name.endswith(","):
                            attribute.name += " " + str(attribute.annotation).strip("()")
                        attribute.annotation = None
                        with suppress(AttributeError, KeyError):
                            attribute.annotation = one[attribute.name].annotation
