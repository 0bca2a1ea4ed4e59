"""Domains: which cameras see the street, and in which light, weather and paint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from mfuser_streets.layout import View

DomainName = Literal["game", "camera", "fog", "night", "rain", "snow"]
DOMAINS: tuple[DomainName, ...] = get_args(DomainName)
SHIFTED: tuple[DomainName, ...] = DOMAINS[1:]
"""The domains that are not the source."""

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


@dataclass(frozen=True)
class Domain:
    view: View
    world: int
    """Domains of one world show the same streets (in other weather); worlds share none."""
    style: Callable[[np.random.Generator], Style]


_GAME_VIEW = View((1.35, 1.7), (1.1, 1.3), (0.44, 0.52), (0.42, 0.58), 0.25)
_CAMERA_VIEW = View((1.75, 2.3), (1.4, 1.75), (0.37, 0.45), (0.4, 0.6), 0.12)


def _game(rng: np.random.Generator) -> Style:
    u = rng.uniform
    return Style(
        "vivid",
        saturation=1.12,
        exposure=u(0.97, 1.05),
        contrast=1.06,
        sun=u(0.36, 0.5),
        sky=(0.25, 0.53, 0.9),
        skyline=(0.72, 0.87, 0.98),
        clouds=u(0.1, 0.6),
        texture=0.55,
        noise=0.004,
    )


def _camera(rng: np.random.Generator) -> Style:
    u = rng.uniform
    warm = u(-0.06, 0.08)
    return Style(
        "muted",
        saturation=u(0.8, 1.1),
        exposure=u(0.95, 1.25),
        contrast=u(0.9, 1.15),
        balance=(1 + warm, 1.0, 1 - warm),
        sun=u(0.15, 0.55),
        sky=(0.52, 0.63, 0.75),
        skyline=(0.83, 0.86, 0.88),
        clouds=u(0.4, 1.0),
        texture=u(0.9, 1.4),
        fog=u(0.001, 0.004),
        airlight=(0.78, 0.8, 0.82),
        blur=u(2.0, 3.2),
        noise=u(0.018, 0.032),
        vignette=u(0.2, 0.4),
    )


def _fog(rng: np.random.Generator) -> Style:
    gray = rng.uniform(0.68, 0.8)
    return replace(
        _camera(rng),
        sun=0.0,
        fog=float(np.exp(rng.uniform(np.log(0.022), np.log(0.06)))),
        airlight=(gray, gray + 0.005, gray + 0.015),
        sky=(gray,) * 3,
        skyline=(gray,) * 3,
        clouds=0.0,
        contrast=0.95,
        saturation=rng.uniform(0.6, 0.9),
    )


def _night(rng: np.random.Generator) -> Style:
    u = rng.uniform
    return replace(
        _camera(rng),
        sun=0.0,
        night=u(0.86, 0.97),
        lit=u(0.2, 0.5),
        sky=(0.05, 0.055, 0.085),
        skyline=(0.13, 0.11, 0.11),
        clouds=0.15,
        noise=u(0.035, 0.055),
        exposure=u(0.95, 1.25),
        fog=u(0.002, 0.006),
        airlight=(0.1, 0.09, 0.09),
        contrast=1.05,
    )


def _rain(rng: np.random.Generator) -> Style:
    u = rng.uniform
    gray = u(0.55, 0.68)
    return replace(
        _camera(rng),
        sun=0.0,
        sky=(gray - 0.1, gray - 0.07, gray - 0.03),
        skyline=(gray + 0.06,) * 3,
        clouds=0.7,
        wet=u(0.5, 0.85),
        streaks=u(0.5, 1.0),
        drops=u(0.2, 1.0),
        fog=u(0.006, 0.014),
        airlight=(gray,) * 3,
        exposure=u(0.75, 0.95),
        saturation=u(0.65, 0.9),
        texture=0.8,
    )


def _snow(rng: np.random.Generator) -> Style:
    u = rng.uniform
    gray = u(0.76, 0.86)
    return replace(
        _camera(rng),
        sun=0.0,
        sky=(gray - 0.06, gray - 0.04, gray),
        skyline=(gray + 0.05,) * 3,
        clouds=0.5,
        snow=u(0.55, 1.0),
        flakes=u(0.4, 1.0),
        fog=u(0.006, 0.016),
        airlight=(gray, gray, gray + 0.02),
        saturation=u(0.6, 0.85),
        exposure=u(0.92, 1.1),
    )


DOMAIN: dict[DomainName, Domain] = {
    "game": Domain(_GAME_VIEW, 0, _game),
    "camera": Domain(_CAMERA_VIEW, 1, _camera),
    "fog": Domain(_CAMERA_VIEW, 1, _fog),
    "night": Domain(_CAMERA_VIEW, 1, _night),
    "rain": Domain(_CAMERA_VIEW, 1, _rain),
    "snow": Domain(_CAMERA_VIEW, 1, _snow),
}
