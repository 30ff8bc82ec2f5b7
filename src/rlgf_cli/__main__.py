"""``python -m rlgf_cli`` is the ``rlgf`` command: what ``torchrun -m`` and ``accelerate launch -m`` start."""

from rlgf_cli.cli.app import main

if __name__ == "__main__":
    main()
