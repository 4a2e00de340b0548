"""`threefold`, `python -m threefold`: the command line; Ctrl-C and a launcher's end are heard from the first moment."""

from threefold.interrupt import heard_early, heard_normally
from threefold.launch.orphans import end_with_launcher, is_launched

heard_early()
if is_launched():
    end_with_launcher()

from threefold import cli  # noqa: E402


def main() -> int:
    """Run the command line."""
    heard_normally()
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
