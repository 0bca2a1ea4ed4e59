"""How a street becomes a picture: paint, light, weather, sensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """How a scene becomes an image. Strengths are in [0, 1] unless said otherwise."""

    palette: Literal["vivid", "muted"]
    saturation: float = 1.0
    exposure: float = 1.0
    contrast: float = 1.0
    balance: Color = (1.0, 1.0, 1.0)
    """Gain of red, green, blue: the sensor's white."""
    sun: float = 0.5
    """Share of the light that comes from the sun, 0 overcast."""
    sky: Color = (0.35, 0.6, 0.9)
    skyline: Color = (0.75, 0.87, 0.97)
    """The sky overhead and at the horizon."""
    clouds: float = 0.5
    texture: float = 1.0
    """Multiplies the grain of every material."""
    fog: float = 0.0
    """Extinction per meter (Koschmieder: visibility is 3.9 / fog)."""
    airlight: Color = (0.8, 0.8, 0.82)
    night: float = 0.0
    lit: float = 0.0
    """Share of windows that are lit."""
    wet: float = 0.0
    streaks: float = 0.0
    drops: float = 0.0
    snow: float = 0.0
    flakes: float = 0.0
    blur: float = 0.0
    """Standard deviation in thousandths of the image height."""
    noise: float = 0.0
    vignette: float = 0.0
    blend: float = 0.0
    """Share of the other palette."""
    repaint: float = 0.0
    """Deviation of the logarithm of every material's own red, green and blue."""
    hue: float = 0.0
    """Radians by which all colors turn about gray."""
    gamma: float = 1.0
    grain: float = 1.0
    """Fineness of the surface grain: twice as large, half as coarse."""
    outline: float = 0.0
    """Ink along the edges of things, as in a cartoon."""
    levels: int = 0
    """Tones per color that are left; 0 keeps them all."""
    brush: float = 0.0
    """Strokes of a brush over the picture."""
