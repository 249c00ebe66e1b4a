"""The processes that train one model together; alone, a single one."""

from __future__ import annotations


class Ranks:
    """The processes of a run. This is the run of a single process."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag
