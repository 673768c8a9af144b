"""Let torchvision be imported where its compiled operators do not load; run after it was installed.

PyPI's torchvision is built for a torch with a GPU. Beside a CPU build it stops at the two operators whose shapes it
describes unasked; image processors, and vLLM for verifiers that take images, need only its Python part.
"""

import importlib.util
from pathlib import Path

MARK = "# declared for fledge's serving tests"
DECLARATIONS = f"""
{MARK}
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _declared.define(_operator + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is not installed"
    assert spec.origin is not None
    path = Path(spec.origin).with_name("extension.py")
    source = path.read_text()
    if MARK not in source:
        path.write_text(source + DECLARATIONS)
    import torchvision  # noqa: F401


if __name__ == "__main__":
    main()
