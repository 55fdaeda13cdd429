"""`python -m ssl_pretrain.cli`, which is what torchrun starts."""

import sys

from ssl_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
