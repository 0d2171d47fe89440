"""``python -m onnxcar`` is the ``onnxcar`` command."""

from onnxcar.cli import main

if __name__ == "__main__":
    main()
