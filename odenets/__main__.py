"""``python -m odenets`` is the command."""

from odenets.command import main

if __name__ == "__main__":
    main()
