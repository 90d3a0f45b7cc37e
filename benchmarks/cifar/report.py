"""Makes the tables and figures of a comparison anew, from its JSON records alone.

python -m benchmarks.cifar.report DIR [DIR ...]
"""

import sys

from benchmarks.core import command
from benchmarks.core.classification.report import write

if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.cifar.report"))
