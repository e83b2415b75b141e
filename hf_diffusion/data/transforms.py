"""What every image of a set becomes, chosen by its first images where nothing is asked for."""

from dataclasses import dataclass, field
from typing import Any

from PIL import ImageColor


PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ImageTransform:
    """What every image of a set becomes: (C, H, W) pixels of 8 or 16 bits.

    size: (H, W).
    white: the value of images with 16 or 32 bits that is taken for white; other images have their
        own, 255.
    background: the colour, by name or as #rrggbb, that transparent images are laid on.
    """

    channels: int
    size: tuple[int, int]
    bits: int
    resize: bool
    center_crop: bool
    # Not in the repr, which enters the fingerprint of the data: data of before these fields keep
    # theirs.
    white: int = field(default=65535, repr=False)
    background: str = field(default="white", repr=False)

    def describe(self) -> dict[str, Any]:
        """Return the transform as plain values for a card or a config."""
        resize = "none, the images have this size"
        if self.resize:
            crop = "centre crop" if self.center_crop else "random crop"
            resize = f"aspect kept, bicubic with antialiasing (Pillow) to cover the target, then {crop}"
        described = {"channels": self.channels, "size": list(self.size), "bits": self.bits, "resize": resize}
        return described | {"white": self.white if self.bits == 16 else 255, "background": self.background}

    def form(self) -> dict[str, Any]:
        """Arguments of `load_images` that bring other images to this form, without augmentation."""
        plain = {"random_flip": False, "center_crop": True, "streaming": False, "background": self.background}
        return {"channels": self.channels, "resolution": None, "fit_size": self.size, **plain}

    @property
    def varies(self) -> bool:
        """Whether an image gives other pixels in another epoch, so that they cannot be kept."""
        return self.resize and not self.center_crop

    @property
    def background_colour(self) -> tuple[int, int, int]:
        """The background as red, green and blue in 0..255."""
        return ImageColor.getrgb(self.background)[:3]

    @property
    def identity(self) -> str:
        """What enters the fingerprint."""
        extras = {"white": (self.white, 65535), "background": (self.background, "white")}
        return repr(self) + "".join(f", {name}={value!r}" for name, (value, usual) in extras.items() if value != usual)
