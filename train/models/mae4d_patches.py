"""A brain cut into patches of voxels and frames: only patches that hold brain are tokens, only its voxels are values.

(b, c, x, y, z, t) becomes (b, tokens, values). Tokens run over times and, faster, over places; values over frames, voxels
and, fastest, channels. Voxels outside the brain are neither read nor predicted: as inputs they count as 0, whatever the
background of the data is. Where patches reach beyond the volume, what is beyond counts as outside the brain.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmristream.errors import UsageError

Shape3 = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchLayout:
    """The n patches that hold brain, in C order of the grid of patches.

    Attributes:
        places: (n,) int64, number in the grid of patches.
        voxels: (n, voxels of a patch) int64, number in the volume, C order; 0 where outside the brain.
        inside: (n, voxels of a patch) whether a voxel is brain.
    """

    places: NDArray[np.int64]
    voxels: NDArray[np.int64]
    inside: NDArray[np.bool_]


def patch_layout(brain: NDArray[np.bool_], patch: Shape3) -> PatchLayout:
    """Cut the volume of a mask (x, y, z) from its first corner on.

    Raises:
        UsageError: the mask has no voxel.
    """
    if not brain.any():
        raise UsageError("mae4d: the brain's mask has no voxel; give the mask of the data")
    sizes = [(-(-size // length), length) for size, length in zip(brain.shape, patch, strict=True)]
    numbers = np.where(brain, np.arange(brain.size, dtype=np.int64).reshape(brain.shape), -1)
    beyond = [(0, count * length - size) for (count, length), size in zip(sizes, brain.shape, strict=True)]
    padded = np.pad(numbers, beyond, constant_values=-1)
    cut = padded.reshape([number for pair in sizes for number in pair]).transpose(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(-1, patch[0] * patch[1] * patch[2])
    places = np.flatnonzero((cut >= 0).any(axis=1))
    return PatchLayout(places=places, voxels=np.maximum(cut[places], 0), inside=cut[places] >= 0)


def brain_from_positions(positions: Tensor | NDArray[np.int64], grid: Shape3) -> NDArray[np.bool_]:
    """The mask (x, y, z) of a batch's or a dataset's `positions`: (v,), or (m, v), of which any space's voxels count."""
    numbers = np.asarray(positions).reshape(-1)
    brain = np.zeros(grid[0] * grid[1] * grid[2], dtype=bool)
    brain[numbers[numbers >= 0]] = True
    return brain.reshape(grid)


def brain_from_bold(bold: Tensor) -> NDArray[np.bool_]:
    """The mask (x, y, z) of clips without one: voxels that ever differ from the first corner's, the background.

    Use it on many clips at once: a voxel that equals the background in all of them, such as a constant one, is missed.
    """
    corner = bold[:, :, :1, :1, :1, :1]
    brain: NDArray[np.bool_] = (bold != corner).any(dim=-1).any(dim=0).any(dim=0).cpu().numpy()
    return brain


class BrainPatches(nn.Module):
    """Cuts clips into the patches of a brain, and puts patches back.

    The mask is a buffer that a checkpoint holds; what follows from it is made again when the mask is set or loaded, outside
    `forward`. Until a mask is set, every voxel counts as brain.
    """

    brain: Tensor
    places: Tensor
    voxels: Tensor
    inside: Tensor

    def __init__(self, img_size: Shape3, patch_size: tuple[int, ...], in_chans: int) -> None:
        super().__init__()
        px, py, pz, self.frames = patch_size
        self.patch = px, py, pz
        self.size, self.channels = img_size, in_chans
        self.register_buffer("brain", torch.ones(img_size, dtype=torch.bool))
        self._plan(np.ones(img_size, dtype=bool))
        self.register_load_state_dict_post_hook(_plan_again)  # type: ignore[no-untyped-call]

    @property
    def count(self) -> int:
        """Places: patches that hold brain."""
        return len(self.places)

    def set_brain(self, brain: Tensor | NDArray[np.bool_]) -> None:
        """Take a mask (x, y, z) of the volumes; parameters keep their shapes and values.

        Raises:
            UsageError: it is not boolean, has another shape, or no voxel is in it.
        """
        mask = brain.cpu().numpy() if isinstance(brain, Tensor) else np.asarray(brain)
        if mask.dtype != np.bool_ or mask.shape != tuple(self.size):
            raise UsageError(
                f"mae4d: the brain must be a boolean mask of shape {list(self.size)}, got {mask.dtype} of shape "
                f"{list(mask.shape)}; give the mask on the grid of the data"
            )
        self._plan(mask)
        self.brain = torch.from_numpy(mask.copy()).to(self.brain.device)

    def cut(self, bold: Tensor) -> Tensor:
        """(b, c, x, y, z, t) of any strides to (b, tokens, values)."""
        b, c, *_, t = bold.shape
        count, voxels = self.voxels.shape
        frames = bold.movedim(5, 2).reshape(b, c, t, -1)
        chosen = frames.index_select(3, self.voxels.flatten())
        # masked_fill, not a product: a NaN outside the brain must not reach a token.
        values = chosen.view(b, c, -1, self.frames, count, voxels).masked_fill(~self.inside, 0)
        return values.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, self.frames * voxels * c)

    def join(self, values: Tensor) -> Tensor:
        """(b, tokens, values) of all tokens to (b, c, x, y, z, t), 0 outside the brain."""
        b, (count, voxels) = len(values), self.voxels.shape
        split = values.reshape(b, -1, count, self.frames, voxels, self.channels).permute(0, 5, 1, 3, 2, 4)
        frames = split.reshape(b, self.channels, -1, count * voxels)
        # What is outside the brain goes to one voxel after the last, which is cut off.
        beyond = self.size[0] * self.size[1] * self.size[2]
        index = self.voxels.masked_fill(~self.inside, beyond).flatten()
        volume = frames.new_zeros(*frames.shape[:3], beyond + 1).index_copy(3, index, frames)[..., :beyond]
        return volume.reshape(*frames.shape[:3], *self.size).movedim(2, -1)

    def inside_of(self, tokens: Tensor) -> Tensor:
        """Token numbers (b, k) to (b, k, values): which values are brain."""
        inside = self.inside[tokens % self.count]
        b, k, voxels = inside.shape
        every = inside.view(b, k, 1, voxels, 1).expand(b, k, self.frames, voxels, self.channels)
        return every.reshape(b, k, -1)

    def frames_of(self, tokens: Tensor) -> Tensor:
        """Token numbers (b, k) to (b, k, frames of a patch): the frames that a token's values are of."""
        first = tokens // self.count * self.frames
        return first.unsqueeze(-1) + torch.arange(self.frames, device=tokens.device)

    def _plan(self, brain: NDArray[np.bool_]) -> None:
        layout = patch_layout(brain, self.patch)
        for name in ("places", "voxels", "inside"):
            table = torch.from_numpy(getattr(layout, name)).to(self.brain.device)
            self.register_buffer(name, table, persistent=False)


def _plan_again(patches: nn.Module, _: object) -> None:
    """After a mask has been loaded."""
    assert isinstance(patches, BrainPatches)
    if patches.brain.device.type != "meta":
        patches._plan(patches.brain.cpu().numpy())


def normalised(values: Tensor, inside: Tensor, channels: int) -> Tensor:
    """(b, k, values) with each patch and channel at mean 0 and SD 1 over what is brain; 0 outside.

    A patch that does not vary is 0: its variance counts as 1e-6 more, the constant of the published masked autoencoders.
    """
    shape = (*values.shape[:2], -1, channels)
    counted = inside.reshape(shape)
    x = torch.where(counted, values.float().reshape(shape), 0.0)
    number = counted.sum(2, keepdim=True).clamp_min(1)
    centred = torch.where(counted, x - x.sum(2, keepdim=True) / number, 0.0)
    variance = centred.square().sum(2, keepdim=True) / number
    return (centred / (variance + 1e-6).sqrt()).flatten(2)
