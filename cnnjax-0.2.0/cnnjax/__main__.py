"""`python -m cnnjax COMMAND` is `cnnjax COMMAND`."""

from cnnjax.commands import main

if __name__ == "__main__":
    main()
