"""From a scene and a style to an image: paint, light, weather, sensor."""

from __future__ import annotations

import cv2
import numpy as np

from mfuser_streets import materials
from mfuser_streets.geometry import Scene
from mfuser_streets.materials import Glow
from mfuser_streets.noise import BANK, noise_bank, tile, white
from mfuser_streets.styles import Style

_SKY = materials.INDEX["sky"]
_VEGETATION = int(materials.LABEL[materials.INDEX["leaf"]])
_ROAD = int(materials.LABEL[materials.INDEX["asphalt"]])
_SIDEWALK = int(materials.LABEL[materials.INDEX["paving"]])


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
    if style.brush:
        frame.brush()
    if style.outline:
        frame.outline()
    return frame.sensor()


def _planes(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (3, H, W)"""
    return np.stack(cv2.split(image))


def _pack(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors (n, 3) in [0, 1] and alpha (n,) -> (n,) uint32, to be looked up in one go."""
    rgba = np.column_stack([colors, alpha])
    return (np.clip(rgba, 0, 1) * 255 + 0.5).astype(np.uint8).view(np.uint32)[:, 0]


class _Frame:
    """An image in the making: float32 (3, H, W), RGB, 1 is white.

    Planes, as numpy multiplies (3, H, W) by (H, W) several times faster than (H, W, 3).
    """

    def __init__(self, scene: Scene, style: Style, rng: np.random.Generator) -> None:
        self.scene, self.style, self.rng = scene, style, rng
        self.ids = scene.pixels().astype(np.intp)
        self.h, self.w = self.ids.shape
        self.labels = materials.LABEL[scene.material]
        self.ground = materials.GROUND[scene.material] & (scene.normal[:, 1] > 0.5)
        self.colors = self._colors()
        shaded = self.colors * self._shade()[:, None]
        painted = self._antialiased(_pack(shaded, scene.material == _SKY))
        self.image, self.sky_share = painted[:3], painted[3]
        camera = scene.camera
        f = camera.focal * self.h
        columns, rows = (np.arange(n, dtype=np.float32) + 0.5 for n in (self.w, self.h))
        self.right = (columns - camera.center * self.w) / f
        """(W,): tangent of the angle to the right of the camera's axis."""
        self.up = ((camera.horizon * self.h - rows) / f)[:, None]
        """(H, 1): tangent of the angle above it."""
        plane = scene.plane
        inverse = plane[:, 0].take(self.ids)
        inverse *= self.right
        inverse += plane[:, 1].take(self.ids) * self.up
        inverse += plane[:, 2].take(self.ids)
        self.depth = 1.0 / np.maximum(inverse, np.float32(1 / 400))

    def _antialiased(self, packed: np.ndarray) -> np.ndarray:
        """A color per part -> float32 (4, H, W), averaged over the supersampled map."""
        ids = self.scene.ids.astype(np.intp)  # faster than letting take() convert
        wide = packed.take(ids).view(np.uint8).reshape(*ids.shape, 4)
        small = cv2.resize(wide, (self.w, self.h), interpolation=cv2.INTER_AREA)
        return np.multiply(_planes(small), np.float32(1 / 255), dtype=np.float32)

    def _mask(self, per_part: np.ndarray) -> np.ndarray:
        """A number per part -> float32 (H, W)."""
        return per_part.astype(np.float32).take(self.ids)

    def _blend(self, color: np.ndarray | float, amount: np.ndarray) -> None:
        """Toward a color (3,), an image (3, H, W) or a gray, by `amount` (H, W)."""
        if isinstance(color, np.ndarray) and color.ndim == 1:
            color = color.astype(np.float32)[:, None, None]
        self.image += (color - self.image) * amount

    def _colors(self) -> np.ndarray:
        """(n, 3): every part's own color in this palette."""
        scene, palette = self.scene, self.style.palette
        draw = scene.draw
        count = materials.SWATCH_COUNT[palette][scene.material]
        swatch = np.minimum(draw[:, 0] * count, count - 1).astype(np.int64)
        colors = materials.COLORS[palette][scene.material, swatch]
        if self.style.blend:
            other = materials.OTHER[palette]
            count = materials.SWATCH_COUNT[other][scene.material]
            swatch = np.minimum(draw[:, 0] * count, count - 1).astype(np.int64)
            mixed = materials.COLORS[other][scene.material, swatch]
            colors = colors + np.float32(self.style.blend) * (mixed - colors)
        if self.style.repaint:
            gains = self.rng.standard_normal((len(materials.LABEL), 3), dtype=np.float32)
            gains = np.exp(np.float32(self.style.repaint) * gains)
            colors = colors * gains[scene.material]
        jitter = materials.JITTER[scene.material] * 2.0
        warm = (draw[:, 1] - 0.5) * jitter
        colors = colors * (1 + ((draw[:, 2] - 0.5) * 2.4 * jitter))[:, None]
        colors = colors * (1 + warm[:, None] * np.array([0.7, 0.0, -0.7], np.float32))
        return (colors * scene.tone[:, None]).astype(np.float32)

    def _shade(self) -> np.ndarray:
        """(n,): light on each part; 1 is the light on level ground under the open sky."""
        normal, sun = self.scene.normal, np.array(self.scene.sun, np.float32)
        share = self.style.sun
        toward = np.maximum(normal @ sun, 0.0)
        # Upright faces see half the sky and, below it, bright ground.
        ambient = (0.84 + 0.16 * normal[:, 1]) * (1 - 0.55 * share)
        shade = ambient + 0.95 * share * toward
        round_ = (normal[:, 2] == -1.0) & (normal[:, 1] == 0.0)
        shade = np.where(round_, 0.9 + 0.1 * share * np.sign(-sun[2]), shade)
        return np.minimum(shade, 1.25).astype(np.float32)

    def sky(self) -> None:
        style = self.style
        rows = int(np.flatnonzero(self.sky_share.any(1)).max(initial=-1)) + 1
        if rows == 0:
            return
        up = np.maximum(self.up[:rows], 0)
        height = np.minimum(up / 0.38, 1) ** 0.7
        top, low = (np.array(c, np.float32)[:, None, None] for c in (style.sky, style.skyline))
        sky = low + (top - low) * height
        if style.clouds:
            # A ceiling of clouds: the ray meets it at a distance of 1 / up.
            distance = 1 / np.maximum(up, 0.03)
            ox, oy = self.rng.uniform(0, BANK, 2)
            x = (self.right * distance * 42 + ox).astype(np.float32)
            y = np.broadcast_to(distance * 60 + oy, x.shape).astype(np.float32)
            layer = tile(noise_bank()[1], x, y)
            cover = np.clip((layer - 1.1 + 1.5 * style.clouds) * 0.9, 0, 1)
            cover *= np.minimum(up / 0.06, 1) * 0.85
            relief = 1 - 0.1 * np.clip(layer, 0, 2)
            white = low * 0.5 + np.float32(0.5 * max(style.skyline))
            sky = sky + (white * relief - sky) * cover
        image = self.image[:, :rows]
        image += (sky - image) * self.sky_share[:rows]

    def _surface(self) -> tuple[np.ndarray, np.ndarray]:
        """Two coordinates in meters (H, W) that vary along whatever is seen there.

        On the ground x and z, on upright faces y and a mixture of x and z.
        """
        x = self.right * self.depth
        y = self.up * self.depth
        level = self._mask(self.ground)
        return x + (1 - level) * (np.float32(0.71) * self.depth), y + level * self.depth

    def grain(self) -> None:
        """Roughness that sticks to the surfaces: noise at their place in the world."""
        strength = self._mask(materials.TEXTURE[self.scene.material] * self.style.texture)
        u, v = self._surface()
        fine = np.float32(22 * self.style.grain)
        noise = tile(noise_bank()[0], u * fine, v * fine)
        # Grain finer than a pixel averages out.
        strength *= np.minimum(1.0, 14.0 / self.depth)
        self.image *= 1 + np.clip(noise, -2.2, 2.2) * strength

    def snow_cover(self) -> None:
        """Snow on what faces up, thin where wheels roll, in drifts."""
        scene = self.scene
        lie = np.clip(scene.normal[:, 1], 0, 1)
        on_leaves = 0.35 + 0.9 * np.clip(scene.tone - 0.75, 0, 1)
        lie = np.where(self.labels == _VEGETATION, on_leaves, lie)
        lie = np.where(self.ground & (self.labels == _ROAD), 0.72, lie)
        amount = self._mask(lie * (0.25 + 0.75 * self.style.snow))
        u, v = self._surface()
        drift = tile(noise_bank()[0], u * 9, v * 6)
        cover = np.clip(amount * 1.5 - 0.35 + 0.28 * drift * (amount > 0.05), 0, 0.96)
        white = np.array([0.9, 0.92, 0.96], np.float32)[:, None, None]
        self._blend(white * (0.97 + 0.02 * drift), cover)

    def shadows(self) -> None:
        """On the ground, the sun's shadows and the dark below things."""
        soft = max(0.6, 0.005 * self.h)
        dark = cv2.GaussianBlur(self.scene.contact, (0, 0), soft * 1.6) * np.float32(0.5)
        if self.style.sun:
            share = 0.95 * self.style.sun * self.scene.sun[1]
            hidden = np.float32(share / (1 - 0.55 * self.style.sun + share))
            cast = cv2.GaussianBlur(self.scene.shadow, (0, 0), soft * 0.5)
            dark = np.maximum(dark, cast * hidden)
        self.image *= 1 - dark * self._mask(self.ground / 255)

    def reflections(self) -> None:
        """Wet ground mirrors what stands behind it in the same column."""
        camera = self.scene.camera
        horizon = camera.horizon * self.h
        row = int(np.clip(horizon - 2, 0, self.h - 1))
        # Depth of what each column shows at the horizon: the mirror image of a thing at depth d
        # is turned over about its foot, 2 f height / d rows below the horizon's own mirror.
        depth = cv2.blur(self.depth[row : row + 1], (max(1, self.w // 64), 1))
        foot = 2 * camera.focal * self.h * camera.height / np.maximum(depth, 3.0)
        first = max(0, min(self.h - 1, int(horizon)))
        rows = np.arange(first, self.h, dtype=np.float32)[:, None]
        map_y = (2 * horizon + foot - rows).astype(np.float32)
        map_x = np.broadcast_to(np.arange(self.w, dtype=np.float32), map_y.shape)
        mirror = cv2.remap(
            cv2.merge(list(self.image)),
            np.ascontiguousarray(map_x),
            map_y,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        mirror = _planes(cv2.blur(mirror, (3, max(3, self.h // 24))))
        paved = self.ground & (self.labels <= _SIDEWALK)
        wet = self._mask(paved * self.style.wet)[first:]
        image = self.image[:, first:]
        image *= 1 - 0.35 * wet
        # Fresnel: the flatter the view, the brighter the mirror.
        image += (mirror - image) * (wet * np.clip(0.95 + 1.1 * self.up[first:], 0.3, 0.9))

    def darkness(self) -> None:
        """Night: the light that is left, lamps and their halos, the car's own headlights."""
        style, scene, h = self.style, self.scene, self.h
        glow = materials.GLOW[scene.material]
        lit = (glow == Glow.WINDOW) & (scene.draw[:, 1] < style.lit)
        strength = np.select(
            [lit, glow == Glow.LAMP, glow == Glow.HEADLIGHT, glow == Glow.OWN, glow == Glow.FAINT],
            [0.55 + 0.4 * scene.draw[:, 2], 1.0, 1.0, 0.95, 0.22],
        )
        own = (glow == Glow.OWN) | (glow == Glow.FAINT)
        color = np.where(own[:, None], self.colors, np.array([1.0, 0.8, 0.5], np.float32))
        color = np.where((glow == Glow.HEADLIGHT)[:, None], np.float32(1.0), color)
        light = self._antialiased(_pack(color * strength[:, None], strength > 0))[:3]
        quarter = max(1, self.w // 4), max(1, h // 4)
        small = cv2.resize(cv2.merge(list(light)), quarter, interpolation=cv2.INTER_AREA)
        halo = cv2.GaussianBlur(small, (0, 0), 0.005 * h)
        pool = cv2.GaussianBlur(small, (0, 0), 0.0225 * h)
        # The own headlights: a cone ahead, falling off with distance, low beam.
        beam = np.clip(1.25 - self.depth * np.float32(1 / 42), 0, 1)
        beam *= np.exp(-((self.right / 0.42) ** 2))
        beam *= np.clip(0.85 - self.up / 0.14, 0.06, 1) * (0.62 * style.night)
        ambient = 1 - style.night * (1 - np.array([0.2, 0.2, 0.26], np.float32))
        lighting = beam * np.array([1.0, 0.93, 0.78], np.float32)[:, None, None]
        lighting += ambient[:, None, None]
        wide = np.minimum(pool * 5.0, 0.8) * style.night
        lighting += _planes(cv2.resize(wide, (self.w, h), interpolation=cv2.INTER_LINEAR))
        lighting += (1 - lighting) * self.sky_share
        self.image *= lighting
        self._blend(light, np.minimum(light.max(0) * 1.5, 1.0) * style.night)
        near = cv2.resize(halo, (self.w, h), interpolation=cv2.INTER_LINEAR)
        self.image += _planes(near) * np.float32(0.9 * style.night)

    def fog(self) -> None:
        """Koschmieder (1924): what comes through, and light scattered in."""
        veil = 1 - np.exp(-np.float32(self.style.fog) * self.depth)
        if self.style.fog < 0.02:  # a thin haze leaves the sky its own color
            veil *= 1 - self.sky_share
        self._blend(np.array(self.style.airlight), veil)

    def _count(self, per_square: float) -> int:
        return round(per_square * self.w / self.h)

    def streaks(self) -> None:
        rng, h, w = self.rng, self.h, self.w
        layer = np.zeros((h, w), np.uint8)
        slant = rng.uniform(-0.25, 0.25)
        for near, count in ((0.5, 130), (1.0, 45)):
            spots = rng.uniform(-0.1, 1.1, (self._count(count * self.style.streaks), 3))
            for x, y, s in spots:
                length = (0.07 + 0.04 * s) * near * h
                _line(layer, x * w, y * h, slant * length, length, 70 + 90 * near, h / 256 * near)
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.4, 0.0018 * h))
        self._blend(max(self.style.skyline), layer * np.float32(0.55 / 255))

    def flakes(self) -> None:
        rng, h, w = self.rng, self.h, self.w
        layer = np.zeros((h, w), np.uint8)
        drift = rng.uniform(-0.4, 0.4)
        for count, radius in ((210, 0.0018), (55, 0.0038), (8, 0.009)):
            for x, y, s in rng.uniform(0, 1, (self._count(count * self.style.flakes), 3)):
                r = radius * (0.6 + 0.8 * s) * h
                _line(layer, x * w, y * h, drift * r, 1.5 * r, 235, 1.7 * r)
        layer = cv2.GaussianBlur(layer, (0, 0), max(0.4, 0.0022 * h))
        self._blend(0.97, layer * np.float32(0.9 / 255))

    def drops(self) -> None:
        """Water on the lens: small, upside-down, blurred views."""
        h, w = self.h, self.w
        mask = np.zeros((h, w), np.uint8)
        for x, y, s in self.rng.uniform(0, 1, (int(14 * self.style.drops), 3)):
            r = (0.012 + 0.028 * s * s) * h
            axes = max(1, int(r)), max(1, int(r * 1.15))
            cv2.ellipse(mask, (int(x * w), int(y * h)), axes, 0, 0, 360, 255, -1, cv2.LINE_AA)
        mask = cv2.GaussianBlur(mask, (0, 0), max(0.5, 0.004 * h))
        quarter = max(1, w // 4), max(1, h // 4)
        small = cv2.resize(cv2.merge(list(self.image)), quarter, interpolation=cv2.INTER_AREA)
        lens = cv2.resize(cv2.GaussianBlur(small, (0, 0), max(0.6, 0.012 * h))[::-1], (w, h))
        self._blend(_planes(lens) * np.float32(0.95) + 0.04, mask * np.float32(0.7 / 255))

    def brush(self) -> None:
        """Dabs of one color: what is thinner than the brush goes."""
        k = max(2, self.h // 48)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
        image = cv2.merge(list(self.image))
        strokes = cv2.dilate(cv2.erode(image, kernel), kernel)
        self._blend(_planes(strokes), np.full((self.h, self.w), self.style.brush, np.float32))

    def outline(self) -> None:
        """Ink where one part meets another of another material."""
        material = self.scene.material.take(self.ids)
        edge = np.zeros((self.h, self.w), np.float32)
        edge[1:] = material[1:] != material[:-1]
        edge[:, 1:] = np.maximum(edge[:, 1:], material[:, 1:] != material[:, :-1])
        self.image *= 1 - np.float32(0.8 * self.style.outline) * edge

    def sensor(self) -> np.ndarray:
        """Optics, exposure, white balance, contrast, saturation, noise; then bytes (H, W, 3)."""
        style = self.style
        image = cv2.merge(list(self.image))
        if style.blur:
            image = cv2.GaussianBlur(image, (0, 0), max(0.35, style.blur / 1000 * self.h))
        # One affine map of RGB: gain, contrast about mid-gray, and saturation.
        luma = np.array([0.299, 0.587, 0.114], np.float32)
        saturate = style.saturation * np.eye(3) + (1 - style.saturation) * luma[None]
        turn = _turn(style.hue) if style.hue else np.eye(3)
        balance = np.diag(np.array(style.balance))
        matrix = style.contrast * saturate @ turn @ balance * style.exposure
        offset = np.full((3, 1), 0.45 * (1 - style.contrast))
        image = _planes(cv2.transform(image, np.hstack([matrix, offset]).astype(np.float32)))
        if style.vignette:
            x = np.linspace(-1, 1, self.w, dtype=np.float32) ** 2
            y = np.linspace(-1, 1, self.h, dtype=np.float32)[:, None] ** 2
            image *= 1 - np.float32(0.5 * style.vignette) * (x + y)
        np.clip(image, 0, 1, out=image)
        if style.noise:
            # Shot noise grows with the root of the light; the floor is the readout's.
            noise = np.sqrt(image)
            noise += 0.5
            noise *= np.float32(style.noise)
            noise *= white(image.shape, self.rng)
            image += noise
            np.clip(image, 0, 1, out=image)
        image *= 255
        image += 0.5
        pixels = cv2.merge(list(image.astype(np.uint8)))
        if style.gamma != 1 or style.levels:
            tones = np.linspace(0, 1, 256) ** style.gamma
            if style.levels:
                tones = np.round(tones * (style.levels - 1)) / (style.levels - 1)
            pixels = cv2.LUT(pixels, (tones * 255 + 0.5).astype(np.uint8))
        return pixels


def _turn(angle: float) -> np.ndarray:
    """(3, 3): RGB turned about the axis of grays by `angle` radians (Rodrigues)."""
    third, root = (1 - np.cos(angle)) / 3, np.sin(angle) / np.sqrt(3)
    c = np.cos(angle) + third
    return np.array(
        [
            [c, third - root, third + root],
            [third + root, c, third - root],
            [third - root, third + root, c],
        ]
    )


def _line(
    layer: np.ndarray, x: float, y: float, dx: float, dy: float, value: float, width: float
) -> None:
    """A smooth line from (x, y) by (dx, dy), in pixels, placed to a sixteenth of one."""
    start, end = (int(x * 16), int(y * 16)), (int((x + dx) * 16), int((y + dy) * 16))
    cv2.line(layer, start, end, int(value), max(1, round(width)), cv2.LINE_AA, 4)
