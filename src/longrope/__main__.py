"""`python -m longrope`: the command line."""

from longrope.cli.main import main

if __name__ == "__main__":
    main()
