"""`ray submit cluster.yaml pipeline/submit.py -- sweep=paper` is `farebox run sweep=paper address=auto`."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "address=auto", *sys.argv[1:]]))
