"""`python -m train RECIPE` and `torchrun -m train RECIPE`."""

from train.main import main

if __name__ == "__main__":
    raise SystemExit(main())
