"""The teacher's hidden states are kept where there is room, and found again."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_base as tiny

from jaxbake.bake.targets import FILE, content_key, open_table, where_to_keep
from jaxbake.config import TrainConfig
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import delta_digest
from jaxbake.errors import JaxbakeError

GIB = 1 << 30


def test_the_first_room_that_is_large_enough_is_taken(tmp_path):
    settings = TrainConfig(teacher_device_gb=1, teacher_host_gb=2, teacher_disk_gb=4)
    rooms = [where_to_keep(size * GIB, settings, tmp_path) for size in (1, 2, 4, 5)]
    assert rooms == ["device", "host", "disk", None]
    assert where_to_keep(3 * GIB, settings, None) is None  # no folder, no file
    with pytest.raises(JaxbakeError, match="teacher_host_gb"):
        TrainConfig(teacher_host_gb=-1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_file_counts_once_it_is_whole_and_for_its_own_content(tmp_path, dtype):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3).astype(dtype)
    table = open_table((4, 3), dtype, tmp_path, "a")
    table.rows[:] = rows
    assert not open_table((4, 3), dtype, tmp_path, "a").complete  # as after a kill: the first was never finished
    table = open_table((4, 3), dtype, tmp_path, "a")
    table.rows[:] = rows
    table.finish()
    found = open_table((4, 3), dtype, tmp_path, "a")
    assert found.complete and found.rows.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found.rows, np.float32), np.asarray(rows, np.float32))
    assert not open_table((4, 3), dtype, tmp_path, "b").complete
    assert not open_table((4, 3), dtype, tmp_path, "a").complete  # "b" has begun to take its place


def test_the_key_tells_apart_what_the_teacher_reads():
    def example(prefix, tail):
        ids = [np.array(x, np.int32) for x in (prefix, [], tail)]
        return Example("bake", ids[0], ids[1], ids[2], np.ones(len(tail), bool))

    none, some = [np.zeros(0, np.int32)], [np.ones(2, np.int32)]
    keys = {
        content_key("base", [example([1, 2], [3])], none),
        content_key("base", [example([1], [2, 3])], none),
        content_key("base", [example([1, 2], [3])], some),
        content_key("other", [example([1, 2], [3])], none),
        content_key("base", [example([1, 2], [3])] * 2, none),
    }
    assert len(keys) == 5


def test_where_it_is_kept_does_not_change_the_bake(tmp_path):
    digests = set()
    for name, rooms in (("device", {}), ("host", {"teacher_device_gb": 0}), ("disk", {"teacher_host_gb": 0})):
        config = tiny.with_train(**({"teacher_device_gb": 0} if name != "device" else {}) | rooms)
        result = tiny.tiny_bake(tmp_path / name, replace(config))
        digests.add(delta_digest(result.delta))
        assert Path(tmp_path / name / "teacher" / FILE).exists() == (name == "disk")
    assert len(digests) == 1
