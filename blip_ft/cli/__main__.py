"""``python -m blip_ft.cli``."""

import sys

from blip_ft.cli import main

if __name__ == "__main__":
    sys.exit(main())
