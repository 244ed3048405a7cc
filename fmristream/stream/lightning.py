"""The stream as a Lightning DataModule; imported where it is used, since Lightning takes seconds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmristream.errors import MissingExtraError
from fmristream.stream.augment import Compose
from fmristream.stream.clips import StreamingDataset
from fmristream.stream.loader import StreamingLoader

if TYPE_CHECKING:
    import torch

try:
    from lightning.pytorch import LightningDataModule
except ImportError:
    try:
        from pytorch_lightning import LightningDataModule
    except ImportError as error:
        raise MissingExtraError("ClipsDataModule needs the package lightning: pip install lightning") from error


class ClipsDataModule(LightningDataModule):  # type: ignore[misc]
    """Training, validation and test streams of one dataset.

    Loaders are made when Lightning asks for them: after it has started the processes, so that ranks are known. It gives
    samplers of its own to DataLoaders alone, and these are none. The training stream's state goes into every checkpoint with
    this module: Lightning keeps a state of loaders too, but leaves it aside where an epoch has ended, and the first epoch
    would come again.

    Args:
        train: shuffled windows, that is, a StreamingDataset with a seed.
        val: in stored order (no seed); none where not given.
        test: likewise.
        batch_size: global, over all ranks.
        eval_batch_size: of validation and test; `batch_size` where not given.
        augment: what happens to training batches on the device.
        loader: further arguments of StreamingLoader, such as `threads`.
    """

    def __init__(
        self,
        *,
        train: StreamingDataset | None = None,
        val: StreamingDataset | None = None,
        test: StreamingDataset | None = None,
        batch_size: int,
        eval_batch_size: int | None = None,
        augment: Compose | None = None,
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._clips = {"train": train, "val": val, "test": test}
        self._sizes = {"train": batch_size, "val": eval_batch_size or batch_size, "test": eval_batch_size or batch_size}
        self._augment = augment
        self._options = dict(loader or {})
        self._loaders: dict[str, StreamingLoader] = {}
        self._state: dict[str, Any] | None = None  # of the training stream, while there is no loader

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def transfer_batch_to_device(self, batch: Any, device: "torch.device", dataloader_idx: int) -> Any:
        """The batch placed there, and augmented while training."""
        training = self.trainer is not None and self.trainer.training
        return batch.to(device, augment=self._augment if training else None)

    def state_dict(self) -> dict[str, Any]:
        """Where the training stream is after the last batch handed out."""
        if "train" in self._loaders:
            return self._loaders["train"].state_dict()
        return dict(self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there; what belongs to another stream is refused when the loader is made."""
        self._state = dict(state_dict) or None
        if self._state and "train" in self._loaders:
            self._loaders["train"].load_state_dict(self._state)

    def teardown(self, stage: str) -> None:
        self._state = self.state_dict() or None
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()

    def _loader(self, part: str) -> Any:
        clips = self._clips[part]
        if clips is None:
            return []
        if part not in self._loaders:
            self._loaders[part] = StreamingLoader(clips, batch_size=self._sizes[part], **self._options)
            if part == "train" and self._state:
                self._loaders[part].load_state_dict(self._state)
        return self._loaders[part]
