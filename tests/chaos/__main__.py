"""`python tests/chaos`: see __init__.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # Python has put this folder there

from chaos.run import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
