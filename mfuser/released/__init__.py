"""Released checkpoints -> our parameters: one table per format, and the code that reads them.

`eva`, `clip` and `siglip` are the three released MFuser models, `tqdm` their one-tower ancestor.
The names on our side are those of the pairings in registry.toml: timm's DINOv2 as VFM, open_clip's
towers as VLM.
"""

from __future__ import annotations

from collections.abc import Iterable

from mfuser.errors import CheckpointError
from mfuser.released import clip, eva, siglip, tqdm
from mfuser.released.translate import Format, Translation, translate

FORMATS: tuple[Format, ...] = (eva.FORMAT, clip.FORMAT, siglip.FORMAT, *tqdm.FORMATS)

__all__ = ["FORMATS", "Format", "Translation", "recognize", "translate"]


def recognize(keys: Iterable[str], source: str = "the state dict") -> Format:
    """The format all of whose marks are among the keys. Raises CheckpointError if there is none."""
    given = set(keys)
    for form in FORMATS:
        if form.matches(given):
            return form
    shown = ", ".join(sorted(given)[:3])
    raise CheckpointError(
        f"{source} is not in a known format: its {len(given)} tensors ({shown}, …) are not those "
        f"of {'; '.join(f.title for f in FORMATS)}"
    )
