"""What is measured."""

import importlib


_EXPORTS = {
    "FID": "fid",
    "InceptionScore": "inception_score",
    "LPIPS": "lpips",
    "PSNR": "psnr",
    "PrecisionRecall": "precision_recall",
    "RFID": "rfid",
    "SFID": "sfid",
    "SSIM": "ssim",
}


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.modules.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
