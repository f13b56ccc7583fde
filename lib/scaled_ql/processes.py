"""Checks before a program starts processes: the machine's accelerators, and the script's main guard."""

import os
import sys
from pathlib import Path


def main_guard_hint() -> str:
    """Explain processes that ended at their start, if the program is a script without a main guard.

    Such a process first imports the script; without a guard it begins the script's work again, and Python ends it.

    Returns:
        a sentence with the remedy; "" if the script has a guard, or there is no script.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not file or not Path(file).is_file() or "__name__" in Path(file).read_text(encoding="utf-8", errors="replace"):
        return ""
    return (
        f"{file} starts processes without a main guard: each of them runs the script again and ends. Put its work "
        'below a line if __name__ == "__main__":.'
    )


def accelerators() -> list[str]:
    """Numbers of this machine's NVIDIA accelerators, as CUDA_VISIBLE_DEVICES lists them; JAX is not needed."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
