"""Run a sweep in this process, one trial after another: python -m tests.http.drive KEY=VALUE ..."""

import sys

from pipeline.config.compose import compose
from pipeline.errors import FareboxError
from pipeline.sweep.in_process import run_all
from pipeline.trials.plan import make_plan

if __name__ == "__main__":
    try:
        run_all(make_plan(compose(sys.argv[1:])), print)
    except FareboxError as error:
        print(error)
        sys.exit(3)
