"""`threefold` and `python -m threefold`: the command line, with Ctrl-C heard from the first moment."""

from threefold.interrupt import heard_early, heard_normally

heard_early()

from threefold import cli  # noqa: E402


def main() -> int:
    """Run the command line."""
    heard_normally()
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
