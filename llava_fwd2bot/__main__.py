"""`python -m llava_fwd2bot` is `fwd2bot`; torchrun and accelerate launch start it by this name."""

import sys

from .cli.main import main

sys.exit(main())
