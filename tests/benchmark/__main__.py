"""So that `python tests/benchmark` runs the package that this folder is."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    from benchmark.command import main

    main()
