"""What lies where in a study's folder, and what its files have in common. A leaf."""

from typing import NamedTuple

STUDY, LOCK = "study.json", "study.lock"
WORKERS_LOG = "workers.log"  # what worker processes print: the study's own process shows one bar, of all runs
RUNS, RESULT, SETTINGS = "runs", "result.json", "settings.json"  # a run's are in RUNS/DATA/METHOD/SEED


class Run(NamedTuple):
    """One training run of a study."""

    data: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        """Its folder below the study's."""
        return f"{RUNS}/{self.data}/{self.method}/{self.seed}"


class Comparison(NamedTuple):
    """Methods that are held against one of them.

    Attributes:
        against: the method that others are measured by.
        methods: the others.
        about: what is asked, for the report.
    """

    against: str
    methods: tuple[str, ...]
    about: str = ""
