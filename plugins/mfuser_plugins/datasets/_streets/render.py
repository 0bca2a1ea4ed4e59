"""From a scene and a style to an image: paint, light, weather, sensor."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from mfuser_plugins.datasets._streets import materials
from mfuser_plugins.datasets._streets.geometry import Scene
from mfuser_plugins.datasets._streets.materials import Glow
from mfuser_plugins.datasets._streets.styles import Style

_SKY = materials.INDEX["sky"]
_BANK = 512
_VEGETATION = int(materials.LABEL[materials.INDEX["leaf"]])


def render(scene: Scene, style: Style, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) RGB."""
    frame = _Frame(scene, style, rng)
    frame.sky()
    frame.grain()
    if style.snow:
        frame.snow_cover()
    frame.shadows()
    if style.wet:
        frame.reflections()
    if style.night:
        frame.darkness()
    if style.fog:
        frame.fog()
    if style.streaks:
        frame.streaks()
    if style.flakes:
        frame.flakes()
    if style.drops:
        frame.drops()
    return frame.sensor()


@functools.cache
def _noise_bank() -> tuple[np.ndarray, np.ndarray]:
    """Tiles of noise, (512, 512), mean 0 and deviation 1, periodic: grain, and clouds."""
    rng = np.random.default_rng(20)
    grain = np.zeros((_BANK, _BANK), np.float32)
    clouds = np.zeros((_BANK, _BANK), np.float32)
    for tile, octaves in ((grain, ((1, 0.5), (2, 0.7), (5, 0.8), (14, 0.8), (60, 0.9))),
                          (clouds, ((6, 0.12), (14, 0.3), (32, 0.6), (70, 1.0)))):  # fmt: skip
        for scale, weight in octaves:
            white = rng.standard_normal((_BANK, _BANK)).astype(np.float32)
            smooth = cv2.GaussianBlur(np.tile(white, (3, 3)), (0, 0), scale * 0.6)
            layer = smooth[_BANK : 2 * _BANK, _BANK : 2 * _BANK]
            tile += weight * layer / layer.std()
        tile -= tile.mean()
        tile /= tile.std()
    return grain, clouds


def _pack(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (n, 3) in [0, 1] and alpha (n,) -> (n,) uint32, to be looked up in one go."""
    rgba = np.concatenate([colours, alpha[:, None]], 1)
    return (np.clip(rgba, 0, 1) * 255 + 0.5).astype(np.uint8).view(np.uint32)[:, 0]


class _Frame:
    """An image in the making: float32 (H, W, 3), RGB, 1 is white."""

    def __init__(self, scene: Scene, style: Style, rng: np.random.Generator) -> None:
        self.scene, self.style, self.rng = scene, style, rng
        self.ids = scene.pixels()
        self.h, self.w = self.ids.shape
        self.is_sky = scene.material == _SKY
        self.is_ground = materials.GROUND[scene.material] & (scene.normal[:, 1] > 0.5)
        self.colours = self._colours()
        self.shade = self._shade()
        painted = self._antialiased(_pack(self.colours * self.shade[:, None], self.is_sky * 1.0))
        self.image = painted[..., :3]
        self.sky_share = painted[..., 3:]
        camera = scene.camera
        f = camera.focal * self.h
        self.right = ((np.arange(self.w, dtype=np.float32) + 0.5) - camera.centre * self.w) / f
        self.up = (camera.horizon * self.h - (np.arange(self.h, dtype=np.float32) + 0.5)) / f
        plane = scene.plane
        inverse = plane[:, 0].take(self.ids)
        inverse *= self.right
        inverse += plane[:, 1].take(self.ids) * self.up[:, None]
        inverse += plane[:, 2].take(self.ids)
        self.depth = 1.0 / np.maximum(inverse, 1 / 400)

    def _antialiased(self, packed: np.ndarray) -> np.ndarray:
        """A colour per part -> float32 (H, W, 4), averaged over the supersampled map."""
        wide = packed.take(self.scene.ids).view(np.uint8).reshape(*self.scene.ids.shape, 4)
        small = cv2.resize(wide, (self.w, self.h), interpolation=cv2.INTER_AREA)
        return np.multiply(small, np.float32(1 / 255), dtype=np.float32)

    def _mask(self, per_part: np.ndarray) -> np.ndarray:
        """A number per part -> float32 (H, W)."""
        return per_part.astype(np.float32).take(self.ids)

    def _colours(self) -> np.ndarray:
        """(n, 3): every part's own colour in this palette."""
        scene, palette = self.scene, self.style.palette
        draw = scene.draw
        count = materials.SWATCH_COUNT[palette][scene.material]
        swatch = np.minimum(draw[:, 0] * count, count - 1).astype(np.int64)
        colours = materials.COLOURS[palette][scene.material, swatch]
        jitter = materials.JITTER[scene.material] * 2.0
        warm = (draw[:, 1] - 0.5) * jitter
        colours = colours * (1 + ((draw[:, 2] - 0.5) * 2.4 * jitter))[:, None]
        colours = colours * (1 + warm[:, None] * np.array([0.7, 0.0, -0.7], np.float32))
        return (colours * scene.tone[:, None]).astype(np.float32)

    def _shade(self) -> np.ndarray:
        """(n,): light on each part; 1 is a face towards the sun."""
        normal, sun = self.scene.normal, np.array(self.scene.sun, np.float32)
        share = self.style.sun
        toward = np.maximum(normal @ sun, 0.0)
        # The sky's light: full from above, less on walls, as on an overcast day.
        ambient = (0.8 + 0.2 * normal[:, 1]) * (1 - 0.55 * share)
        shade = ambient + 0.95 * share * toward
        sprites = (normal[:, 2] == -1.0) & (normal[:, 1] == 0.0)
        shade = np.where(sprites, 0.86 + 0.1 * share * (sun[2] < 0), shade)
        return np.minimum(shade, 1.25).astype(np.float32)

    def sky(self) -> None:
        style = self.style
        if not self.is_sky.take(self.ids[0]).any() and not self.sky_share.any():
            return
        height = np.clip(self.up / 0.38, 0, 1)[:, None] ** 0.7
        top, low = np.array(style.sky, np.float32), np.array(style.skyline, np.float32)
        sky = (low + (top - low) * height)[:, None].repeat(self.w, 1).astype(np.float32)
        if style.clouds:
            # A ceiling of clouds: the ray meets it at a distance of 1 / up.
            distance = 1 / np.maximum(self.up, 0.03)[:, None]
            ox, oy = self.rng.uniform(0, _BANK, 2)
            x = (self.right[None] * distance * 42 + ox).astype(np.float32)
            y = np.broadcast_to(distance * 60 + oy, x.shape).astype(np.float32)
            tile = cv2.remap(_noise_bank()[1], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
            cover = np.clip((tile - 1.1 + 1.5 * style.clouds) * 0.9, 0, 1)
            cover *= np.clip(self.up / 0.06, 0, 1)[:, None] * 0.85
            bright = low * 0.5 + 0.5 * max(style.skyline)
            relief = (1 - 0.1 * np.clip(tile, 0, 2))[..., None]
            sky += (bright * relief - sky) * cover[..., None]
        self.image += (sky - self.image) * self.sky_share

    def grain(self) -> None:
        """Roughness that sticks to the surfaces: noise at their place in the world."""
        strength = self._mask(materials.TEXTURE[self.scene.material]) * self.style.texture
        camera = self.scene.camera
        x = self.right[None] * self.depth
        y = camera.height + self.up[:, None] * self.depth
        # These combinations vary along every upright or level plane.
        u = (x + 0.71 * self.depth) * 22
        v = (y + 0.83 * self.depth) * 22
        noise = cv2.remap(_noise_bank()[0], u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        # Grain finer than a pixel averages out.
        strength *= np.minimum(1.0, 14.0 / self.depth)
        factor = 1 + np.clip(noise, -2.2, 2.2) * strength
        self.image *= factor[..., None]

    def snow_cover(self) -> None:
        style, scene = self.style, self.scene
        label = materials.LABEL[scene.material]
        lie = np.clip(scene.normal[:, 1], 0, 1)
        lie = np.where(label == _VEGETATION, 0.35 + 0.9 * np.clip(scene.tone - 0.75, 0, 1), lie)
        road = self.is_ground & (label == 0)
        lie = np.where(road, 0.72, lie)
        amount = self._mask(lie * (0.25 + 0.75 * style.snow))
        x = self.right[None] * self.depth
        u, v = (x * 9).astype(np.float32), (self.depth * 4 + self.up[:, None] * 40)
        drift = cv2.remap(
            _noise_bank()[0], u, v.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        cover = np.clip(amount * 1.5 - 0.35 + 0.28 * drift * (amount > 0.05), 0, 0.96)
        white = np.array([0.9, 0.92, 0.96], np.float32)
        grey = (0.97 + 0.02 * drift)[..., None]
        self.image += (white * grey - self.image) * cover[..., None]

    def shadows(self) -> None:
        """On the ground, the sun's shadows and the dark below things."""
        ground = self._mask(self.is_ground * 255.0)
        soft = max(0.6, 0.005 * self.h)
        dark = cv2.GaussianBlur(self.scene.contact, (0, 0), soft * 1.6).astype(np.float32) * 0.5
        if self.style.sun:
            share = 0.95 * self.style.sun * self.scene.sun[1]
            hidden = share / (1 - 0.55 * self.style.sun + share)
            cast = cv2.GaussianBlur(self.scene.shadow, (0, 0), soft * 0.5)
            dark = np.maximum(dark, cast.astype(np.float32) * hidden)
        self.image *= (1 - dark * ground * np.float32(1 / 255**2))[..., None]

    def reflections(self) -> None:
        """Wet ground mirrors what stands behind it in the same column."""
        camera = self.scene.camera
        horizon = camera.horizon * self.h
        row = int(np.clip(horizon - 2, 0, self.h - 1))
        # Depth of what each column shows at the horizon: the mirror image of a thing at depth d
        # is turned over about its foot, 2 f height / d rows below the horizon's own mirror.
        depth = cv2.blur(self.depth[row : row + 1], (max(1, self.w // 64), 1))
        foot = 2 * camera.focal * self.h * camera.height / np.maximum(depth, 3.0)
        rows = np.arange(self.h, dtype=np.float32)[:, None]
        wave = _noise_bank()[0][: self.h // 2 + 1, :1].repeat(2, 0)[: self.h] * 0.01 * self.h
        map_y = (2 * horizon + foot - rows + wave).astype(np.float32)
        map_x = np.arange(self.w, dtype=np.float32)[None].repeat(self.h, 0)
        mirror = cv2.remap(
            self.image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        mirror = cv2.blur(mirror, (3, max(3, self.h // 24)))
        flat = self.is_ground & (materials.LABEL[self.scene.material] <= 1)
        # Fresnel: the flatter the view, the brighter the mirror.
        amount = self._mask(flat * self.style.wet) * np.clip(0.75 - 1.1 * -self.up, 0.2, 0.8)[:, None]
        self.image *= (1 - 0.3 * self._mask(flat * self.style.wet))[..., None]
        self.image += (mirror - self.image) * amount[..., None]

    def darkness(self) -> None:
        style, scene, h = self.style, self.scene, self.h
        glow = materials.GLOW[scene.material]
        lit = (glow == Glow.WINDOW) & (scene.draw[:, 1] < style.lit)
        strength = np.select(
            [lit, glow == Glow.LAMP, glow == Glow.HEADLIGHT, glow == Glow.OWN, glow == Glow.FAINT],
            [0.55 + 0.4 * scene.draw[:, 2], 1.0, 1.0, 0.95, 0.22],
        )
        warm = np.array([1.0, 0.8, 0.5], np.float32)
        own = (glow == Glow.OWN) | (glow == Glow.FAINT)
        colour = np.where(own[:, None], self.colours, warm)
        colour = np.where((glow == Glow.HEADLIGHT)[:, None], np.float32(1.0), colour)
        shining = _pack(colour * strength[:, None], strength > 0)
        light = self._antialiased(shining)[..., :3].copy()
        bright = light.max(2, keepdims=True)
        small = cv2.resize(light, (self.w // 4, h // 4), interpolation=cv2.INTER_AREA)
        halo = cv2.GaussianBlur(small, (0, 0), h / 4 * 0.02)
        pool = cv2.GaussianBlur(small, (0, 0), h / 4 * 0.09)
        near = cv2.resize(halo, (self.w, h), interpolation=cv2.INTER_LINEAR)
        wide = cv2.resize(pool, (self.w, h), interpolation=cv2.INTER_LINEAR)
        # The own headlights: a cone ahead, falling off with distance, low beam.
        beam = np.exp(-((self.right[None] / 0.42) ** 2)) * np.clip(1.25 - self.depth / 42, 0, 1)
        beam = beam * np.clip(0.85 - self.up / 0.14, 0.06, 1)[:, None]
        sky_glow = np.array([0.2, 0.2, 0.26], np.float32)
        ambient = 1 - style.night * (1 - sky_glow)
        lamp = np.array([1.0, 0.93, 0.78], np.float32)
        lighting = ambient + (0.62 * style.night) * beam[..., None] * lamp
        lighting += np.minimum(wide * 5.0, 0.8) * style.night
        dark = self.image * lighting
        self.image = self.image * self.sky_share + dark * (1 - self.sky_share)
        self.image += (light - self.image) * np.minimum(bright * 1.5, 1.0) * style.night
        self.image += near * (0.9 * style.night)

    def fog(self) -> None:
        """Koschmieder (1924): what comes through, and light scattered in."""
        through = np.exp(-self.style.fog * np.minimum(self.depth, 400.0))
        # A thin haze leaves the sky its own colour.
        veil = (1 - through)[..., None]
        if self.style.fog < 0.02:
            veil *= 1 - self.sky_share
        self.image += (np.array(self.style.airlight, np.float32) - self.image) * veil

    def streaks(self) -> None:
        rng, h, w = self.rng, self.h, self.w
        k = 3
        layer = np.zeros((h, w), np.uint8)
        slant = rng.uniform(-0.25, 0.25)
        for near, count in ((0.5, 260), (1.0, 90)):
            n = int(count * self.style.streaks * w / (2 * h))
            xs, ys = rng.uniform(-0.1, 1.1, n) * w, rng.uniform(-0.1, 1, n) * h
            lengths = rng.uniform(0.05, 0.1, n) * near * h
            for x, y, length in zip(xs, ys, lengths, strict=True):
                a = int(x * 2**k), int(y * 2**k)
                b = int((x + slant * length) * 2**k), int((y + length) * 2**k)
                cv2.line(layer, a, b, int(70 + 90 * near), max(1, round(h / 256 * near)),
                         cv2.LINE_AA, k)  # fmt: skip
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.4, 0.0018 * h))
        amount = layer.astype(np.float32)[..., None] * np.float32(0.55 / 255)
        self.image += (np.float32(max(self.style.skyline)) - self.image) * amount

    def flakes(self) -> None:
        rng, h, w = self.rng, self.h, self.w
        k = 4
        layer = np.zeros((h, w), np.uint8)
        drift = rng.uniform(-0.4, 0.4)
        for count, radius in ((420, 0.0018), (110, 0.0038), (16, 0.009)):
            n = int(count * self.style.flakes * w / (2 * h))
            spots = rng.uniform(0, 1, (n, 3))
            for x, y, s in spots:
                r = radius * (0.6 + 0.8 * s) * h
                cx, cy = x * w, y * h
                a = int((cx - drift * r) * 2**k), int((cy - r) * 2**k)
                b = int((cx + drift * r) * 2**k), int((cy + r) * 2**k)
                cv2.line(layer, a, b, 235, max(1, round(1.7 * r)), cv2.LINE_AA, k)
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.4, 0.0022 * h))
        self.image += (np.float32(0.97) - self.image) * (
            layer.astype(np.float32)[..., None] * np.float32(0.9 / 255)
        )

    def drops(self) -> None:
        """Water on the lens: small upside-down, blurred views."""
        rng, h, w = self.rng, self.h, self.w
        mask = np.zeros((h, w), np.uint8)
        n = int(14 * self.style.drops)
        for x, y, s in rng.uniform(0, 1, (n, 3)):
            r = (0.012 + 0.028 * s * s) * h
            centre = int(x * w * 8), int(y * h * 8)
            cv2.ellipse(mask, (centre[0] // 8, centre[1] // 8), (max(1, int(r)), max(1, int(r * 1.15))),
                        0, 0, 360, 255, -1, cv2.LINE_AA)  # fmt: skip
        mask = cv2.GaussianBlur(mask, (0, 0), max(0.5, 0.004 * h))
        small = cv2.resize(self.image, (w // 4, h // 4), interpolation=cv2.INTER_AREA)
        lens = cv2.resize(cv2.GaussianBlur(small, (0, 0), max(0.6, 0.012 * h / 4 * 4))[::-1], (w, h))
        amount = mask.astype(np.float32)[..., None] * np.float32(0.7 / 255)
        self.image += (lens * 0.95 + 0.04 - self.image) * amount

    def sensor(self) -> np.ndarray:
        """Exposure, white balance, contrast, colour, optics, noise; then bytes."""
        style, image = self.style, self.image
        if style.blur:
            image = cv2.GaussianBlur(image, (0, 0), max(0.35, style.blur / 1000 * self.h))
        # One affine map of RGB: gain, contrast about mid-grey, and saturation.
        luma = np.array([0.299, 0.587, 0.114], np.float32)
        saturate = style.saturation * np.eye(3) + (1 - style.saturation) * luma[None]
        matrix = style.contrast * saturate @ np.diag(np.array(style.balance)) * style.exposure
        offset = np.full((3, 1), 0.45 * (1 - style.contrast))
        image = cv2.transform(image, np.hstack([matrix, offset]).astype(np.float32))
        if style.vignette:
            x = np.linspace(-1, 1, self.w, dtype=np.float32)[None] ** 2
            y = np.linspace(-1, 1, self.h, dtype=np.float32)[:, None] ** 2
            image *= (1 - 0.5 * style.vignette * (x + y))[..., None]
        if style.noise:
            noise = self.rng.standard_normal(image.shape, dtype=np.float32)
            # Shot noise grows with the root of the light; the floor is the readout's.
            noise *= style.noise * (0.5 + np.sqrt(np.clip(image, 0, 1)))
            image += noise
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
