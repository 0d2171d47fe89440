"""Export the usual public ImageNet models of torchvision to ONNX, each with its checksum beside it.

    pip install torch torchvision onnx
    python scripts/export_torchvision.py --out models/imagenet resnet18 vgg16
    onnxcar inspect models/imagenet/resnet18.onnx

Needs internet once per model: torchvision downloads the trained weights. They carry the licence of their authors, not
ours, so nothing of them is kept in this repository. A checksum tells whether two files are the same export; another
version of torch may write other bytes for the same network.

A tool for developers: the package itself never imports torch or torchvision.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

MODELS = (
    "alexnet",
    "densenet121",
    "googlenet",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg16",
)
NEEDED = "pip install torch torchvision onnx"


def export(name: str, path: Path) -> str:
    """Download the weights of `name`, write `path` and `path`.sha256, and return the checksum.

    Raises:
        URLError: The weights cannot be downloaded.
    """
    import torch
    import torchvision

    net = torchvision.models.get_model(name, weights="IMAGENET1K_V1").eval()
    torch.onnx.export(
        net,
        (torch.zeros(1, 3, 224, 224),),
        str(path),
        dynamo=False,  # one file, without external data and without torch's stack traces inside
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest


def main(argv: Sequence[str] | None = None) -> int:
    """Export the models named on the command line; 0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(description="Export torchvision's ImageNet models to ONNX, with checksums.")
    parser.add_argument("models", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write into (default: this one)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)

    for package in ("torch", "torchvision", "onnx"):
        try:
            __import__(package)
        except ImportError as exc:
            print(f"error: {package} does not import ({exc}). Install what is needed: {NEEDED}", file=sys.stderr)
            return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        path = args.out / f"{name}.onnx"
        if path.exists() and not args.force:
            print(f"error: {path} exists. Take another --out, or --force to replace it.", file=sys.stderr)
            return 1
        try:
            digest = export(name, path)
        except URLError as exc:
            print(
                f"error: the weights of {name} cannot be downloaded ({exc.reason}). This needs internet once; or put "
                "the .pth file into torch's cache folder (TORCH_HOME/hub/checkpoints) and try again.",
                file=sys.stderr,
            )
            return 1
        print(f"{digest}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
