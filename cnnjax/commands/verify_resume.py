"""Does a run that is killed and resumed end as one that is not? See `cnnjax.run.verify_resume`."""

from cnnjax.run.verify_resume import main

__all__ = ["main"]
