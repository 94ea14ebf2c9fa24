import numpy as np

PlaneArrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]

def backends() -> list[str]: ...

class CpuKernels:
    def __init__(self, isa: str, num_threads: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def set_num_threads(self, num_threads: int) -> None: ...
    def ffn(
        self,
        x: np.ndarray,
        arena: np.ndarray,
        offsets: np.ndarray,
        mask: np.ndarray | None,
        threshold: np.ndarray | None,
        record_bytes: int,
        dtype: str,
        gate: tuple[int, int] | None,
        up: tuple[int, int],
        down: tuple[int, int],
        act: str,
        out: np.ndarray,
    ) -> int: ...
    def sketch_scores(
        self,
        x: np.ndarray,
        gate_codes: np.ndarray | None,
        gate_scale: np.ndarray | None,
        up_codes: np.ndarray,
        up_scale: np.ndarray,
        down_norm: np.ndarray,
        act: str,
        out: np.ndarray,
    ) -> None: ...
    def plane_scores(
        self,
        x: np.ndarray,
        gate: PlaneArrays | None,
        up: PlaneArrays,
        down_norm: np.ndarray | None,
        act: str,
        out: np.ndarray,
    ) -> None: ...
    def linear(self, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None: ...
    def paged_attention(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        block_table: np.ndarray,
        num_tokens: int,
        out: np.ndarray,
        scale: float,
    ) -> None: ...
    def read_through(self, data: np.ndarray) -> int: ...
    def read_records(self, data: np.ndarray, offsets: np.ndarray, bytes: int) -> int: ...
