"""`python -m dms_fastai.cli`."""

from . import main

if __name__ == "__main__":
    main()
