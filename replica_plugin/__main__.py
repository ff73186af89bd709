"""`python -m replica_plugin` is `replica-plugin`."""

import sys

from .cli import main

sys.exit(main())
