"""`python -m unclamp` is `unclamp`."""

from unclamp.cli import main

main()
