"""`python -m repquant_fx`."""

from repquant_fx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
