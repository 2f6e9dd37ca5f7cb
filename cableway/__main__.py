"""`python -m cableway` is the command line."""

from cableway.frontend.cli import main

main()
