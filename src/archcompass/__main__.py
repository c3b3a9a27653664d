"""`python -m archcompass` and the console script."""


def main() -> None:
    """Runs the command line."""
    from archcompass.advisor.cli import run

    run()


if __name__ == "__main__":
    main()
