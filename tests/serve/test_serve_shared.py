"""Workers make the same changes in the same order, whichever was asked; and renewal looks."""

import asyncio
import os

import pytest

from cnnjax.serve.renewal import renew, stamp
from cnnjax.serve.shared import Shared
from tests.serve.made import Made, images
from tests.serve.served import Served


def test_a_change_is_made_by_all_and_a_refused_one_by_none(tmp_path, monkeypatch):
    made = {0: [], 1: [], 2: []}
    names = iter(range(100))

    def worker(number):
        async def apply(change):
            if change["kind"] == "bad":
                raise ValueError("refused")
            made[number].append(change["name"])

        shared = Shared(tmp_path, apply)
        # All are in this process here: each needs a place of its own.
        shared._mine = tmp_path / f"made-{os.getpid()}.{number}"
        return shared

    async def main():
        workers = [worker(number) for number in range(2)]
        for each in workers:
            await each.start()
        following = [asyncio.create_task(each.follow()) for each in workers]
        asked = [
            workers[next(names) % 2].change({"kind": "rollout", "name": number})
            for number in range(6)
        ]
        await asyncio.gather(*asked)
        with pytest.raises(ValueError, match="refused"):
            await workers[0].change({"kind": "bad", "name": "x"})
        await workers[1].change({"kind": "load", "name": "last"})
        await asyncio.sleep(0.15)
        late = worker(2)
        await late.start()
        for each in following:
            each.cancel()

    asyncio.run(main())
    assert made[0] == made[1] and sorted(made[0][:6]) == list(range(6))
    # What was loaded at the start is the newest.
    assert made[0][6:] == ["last"] and made[2] == made[0][:6]


def test_a_newer_checkpoint_is_loaded_once_it_is_whole(monkeypatch, tmp_path):
    served = Served(monkeypatch)
    newer = Made()
    served.opened = iter([served.made[0].runtime, newer.runtime])
    source = tmp_path / "model.onnx"
    source.write_bytes(b"1")
    model = served.repository.models["digits"]
    object.__setattr__(model.sources["1"], "path", str(source))

    async def main():
        await served.repository.start()
        task = asyncio.create_task(renew(served.repository, 0.02))
        await asyncio.sleep(0.1)
        await served.repository.infer("digits", images(1))
        assert not newer.batches
        source.write_bytes(b"12")
        await asyncio.sleep(0.2)
        await served.repository.infer("digits", images(1))
        task.cancel()
        await served.repository.close()

    asyncio.run(main())
    assert len(served.made[0].batches) == len(newer.batches) == 1


def test_a_run_is_newer_with_another_step_or_summary(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    first = stamp(str(tmp_path))
    assert stamp(str(tmp_path)) == first
    (tmp_path / "checkpoints" / "20").mkdir()
    second = stamp(str(tmp_path))
    (tmp_path / "summary.json").write_text("{}")
    assert len({first, second, stamp(str(tmp_path))}) == 3
