"""Requests that arrive together are computed together, once each, in order, within bounds."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.serve.batcher import Batcher, Limits, check_limits
from cnnjax.serve.refusals import Busy, Late, Unavailable
from cnnjax.serve.runtime import buckets_up_to, warm
from tests.serve.made import Made, images


def means(answer):
    return answer[0][:, 0].tolist()


def test_buckets_are_powers_of_two_and_the_largest():
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(8) == (1, 2, 4, 8)
    assert buckets_up_to(12) == (1, 2, 4, 8, 12)


def test_a_batch_is_filled_up_to_a_bucket_and_cut_again():
    made = Made(largest=8)
    logits, _ = made.runtime.run_parts([images(1, 2), images(3)])
    assert [len(batch) for batch in made.batches] == [4]
    assert logits[:, 0].tolist() == [1, 2, 3]
    assert means(made.runtime.run(images(*range(11)))) == list(range(11))


def test_requests_of_one_turn_share_a_batch():
    made = Made(largest=4)

    async def main():
        batcher = Batcher(made.runtime)
        answers = await asyncio.gather(*(batcher.submit(images(value)) for value in range(4)))
        await batcher.close()
        return answers

    assert [means(each) for each in asyncio.run(main())] == [[0], [1], [2], [3]]
    assert [len(batch) for batch in made.batches] == [4]


def test_lone_quick_images_are_computed_on_the_event_loop_and_others_by_threads():
    quick, slow = Made(largest=4, lone_secs=2e-4), Made(largest=4, lone_secs=2e-3)

    async def main():
        for made in (quick, slow):
            batcher = Batcher(made.runtime)
            for value in range(5):
                assert means(await batcher.submit(images(value))) == [value]
            for _ in range(20):
                await asyncio.gather(*(batcher.submit(images(value)) for value in range(4)))
            # Others are likely to come soon.
            await batcher.submit(images(7))
            await batcher.close()
        return threading.current_thread()

    loop = asyncio.run(main())
    assert quick.threads[:5] == [loop] * 5
    assert loop not in quick.threads[5:] + slow.threads


def test_a_runtime_knows_how_long_one_image_takes_at_best():
    shapes = ((2, 2, 1), (4, 4, 1))
    made = Made(largest=2, secs=0.01, shapes=shapes)
    assert 0.01 <= warm(made.runtime) < 1
    assert made.batches[-1].shape == (1, 4, 4, 1)


def test_clients_that_ask_again_share_the_next_batch_of_a_slow_network():
    """One begins before seven others: without a wait, batches of 1 and 7 would go on for ever."""
    made = Made(largest=32, secs=0.05)

    async def main():
        batcher = Batcher(made.runtime)

        async def client(value):
            for _ in range(6):
                assert means(await batcher.submit(images(value))) == [value]

        first = asyncio.create_task(client(0))
        while not made.batches:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *(client(value) for value in range(1, 8)))
        await batcher.close()

    asyncio.run(main())
    sizes = [len(batch) for batch in made.batches]
    assert sizes[0] == 1
    assert len(sizes) <= 9


def test_many_quick_images_without_batching_are_answered_in_order():
    made = Made(largest=1, lone_secs=0.0)

    async def main():
        batcher = Batcher(made.runtime, Limits(queue_images=3000))
        for value in range(20):
            await batcher.submit(images(value))
        asked = [batcher.submit(images(value % 250)) for value in range(2500)]
        answers = await asyncio.gather(*asked)
        await batcher.close()
        return answers

    assert [means(each) for each in asyncio.run(main())] == [[n % 250] for n in range(2500)]


def test_who_waits_for_others_need_not_when_the_batcher_closes():
    made = Made(largest=4)

    async def main():
        batcher = Batcher(made.runtime, Limits(delay_secs=9.0))
        asked = asyncio.create_task(batcher.submit(images(3)))
        await asyncio.sleep(0.05)
        assert batcher.queued == 1
        async with asyncio.timeout(5):
            await batcher.close()
        return await asked

    assert means(asyncio.run(main())) == [3]


def test_what_arrives_while_a_batch_is_computed_is_the_next_batch():
    made = Made(largest=8)

    async def main():
        batcher = Batcher(made.runtime)
        made.go.clear()
        first = asyncio.create_task(batcher.submit(images(0)))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher.submit(images(value))) for value in range(1, 6)]
        await asyncio.sleep(0.01)
        assert batcher.queued == 5
        made.go.set()
        await asyncio.gather(first, *others)
        await batcher.close()

    asyncio.run(main())
    assert [len(batch) for batch in made.batches] == [1, 8]
    assert made.batches[1][:5, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_batches_follow_each_other_while_the_event_loop_is_busy():
    made = Made(largest=1)

    async def main():
        batcher = Batcher(made.runtime)
        made.go.clear()
        asked = [asyncio.create_task(batcher.submit(images(value))) for value in range(3)]
        while not made.batches:
            await asyncio.sleep(0.001)
        made.go.set()
        # Nothing else runs on the loop now.
        end = time.monotonic() + 5
        while len(made.batches) < 3 and time.monotonic() < end:
            time.sleep(0.001)
        computed = len(made.batches)
        answers = await asyncio.gather(*asked)
        await batcher.close()
        return computed, [means(answer) for answer in answers]

    assert asyncio.run(main()) == (3, [[0], [1], [2]])


def test_the_delay_waits_for_others_but_not_for_more_than_a_batch():
    made = Made(largest=2)

    async def main():
        batcher = Batcher(made.runtime, Limits(delay_secs=0.1))
        began = time.perf_counter()
        first = asyncio.create_task(batcher.submit(images(1)))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batcher.submit(images(2)))
        full = time.perf_counter() - began
        await batcher.submit(images(3))
        alone = time.perf_counter() - began - full
        await batcher.close()
        return full, alone

    full, alone = asyncio.run(main())
    assert full < 0.08 < 0.1 <= alone
    assert [len(batch) for batch in made.batches] == [2, 1]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0]),
)
def test_every_image_is_answered_once_and_in_its_place(asked, largest, slots, lone_secs):
    """Clients that go away, before or while their images are computed, change nothing of it."""
    made = Made(largest=largest, lone_secs=lone_secs)
    values = iter(range(256))
    requests = [images(*(next(values) for _ in range(size))) for size, _ in asked]

    async def main():
        batcher = Batcher(made.runtime, Limits(queue_images=1000, concurrency=slots))
        tasks = [asyncio.create_task(batcher.submit(each)) for each in requests]
        await asyncio.sleep(0)
        for task, (_, leaves) in zip(tasks, asked, strict=True):
            if leaves:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        assert batcher.queued == 0
        return answers

    for request, (_, leaves), answer in zip(requests, asked, asyncio.run(main()), strict=True):
        if leaves:
            assert isinstance(answer, asyncio.CancelledError)
        else:
            assert means(answer) == request[:, 0, 0, 0].tolist()
    assert max(map(len, made.batches), default=0) <= largest


def test_concurrency_bounds_the_batches_at_a_time():
    made = Made(largest=1, secs=0.01)

    async def main(slots, runtime):
        batcher = Batcher(runtime, Limits(concurrency=slots))
        await asyncio.gather(*(batcher.submit(images(value)) for value in range(6)))
        await batcher.close()

    asyncio.run(main(3, made.runtime))
    assert made.most_running == 3
    alone = Made(largest=1, secs=0.001, parallel=False)
    asyncio.run(main(3, alone.runtime))
    assert alone.most_running == 1


def test_a_full_queue_refuses_and_says_when_to_come_again():
    made = Made(largest=2)

    async def main():
        batcher = Batcher(made.runtime, Limits(queue_images=4))
        made.go.clear()
        running = asyncio.create_task(batcher.submit(images(0, 0)))
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(batcher.submit(images(1, 1))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="4 images are waiting") as busy:
            await batcher.submit(images(2))
        assert busy.value.status == 429 and busy.value.retry_after > 0
        # One whose client leaves makes room.
        waiting[0].cancel()
        await asyncio.sleep(0)
        last = asyncio.create_task(batcher.submit(images(3)))
        await asyncio.sleep(0)
        made.go.set()
        await asyncio.gather(running, waiting[1])
        assert means(await last) == [3]
        await batcher.close()

    asyncio.run(main())
    assert not any((batch == 1).all() and len(batch) > 2 for batch in made.batches)


def test_a_request_larger_than_the_queue_is_answered_when_nothing_waits():
    made = Made(largest=2)

    async def main():
        batcher = Batcher(made.runtime, Limits(queue_images=3))
        answer = await batcher.submit(images(*range(7)))
        await batcher.close()
        return answer

    assert means(asyncio.run(main())) == list(range(7))


def test_what_was_cancelled_or_is_late_is_not_computed():
    made = Made(largest=1)

    async def main():
        batcher = Batcher(made.runtime)
        made.go.clear()
        running = asyncio.create_task(batcher.submit(images(0)))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(batcher.submit(images(1)))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(Late, match=r"within the deadline of 0\.02 s"):
            await batcher.submit(images(2), deadline_secs=0.02)
        with pytest.raises(Late, match="has passed"):
            await batcher.submit(images(2), deadline_secs=0.0)
        made.go.set()
        await running
        assert means(await batcher.submit(images(3))) == [3]
        await batcher.close()

    asyncio.run(main())
    assert [batch[0, 0, 0, 0] for batch in made.batches] == [0, 3]


def test_a_batch_that_fails_fails_its_requests_and_no_others():
    made = Made(largest=4)
    done = []

    async def main():
        batcher = Batcher(made.runtime, on_batch=done.append)
        made.fails = True
        answers = await asyncio.gather(
            *(batcher.submit(images(value)) for value in (1, 2)), return_exceptions=True
        )
        assert [str(each) for each in answers] == ["it fails"] * 2
        made.fails = False
        assert means(await batcher.submit(images(3))) == [3]
        await batcher.close()

    asyncio.run(main())
    assert [(each.images, each.bucket, each.failed) for each in done] == [
        (2, 2, True),
        (1, 1, False),
    ]


def test_closing_answers_what_waits_and_lets_nothing_in():
    made = Made(largest=1)

    async def main():
        batcher = Batcher(made.runtime)
        made.go.clear()
        waiting = [asyncio.create_task(batcher.submit(images(value))) for value in range(3)]
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await batcher.submit(images(9))
        assert not closing.done()
        made.go.set()
        await closing
        return [means(await each) for each in waiting]

    assert asyncio.run(main()) == [[0], [1], [2]]


def test_images_of_two_sizes_are_never_in_one_batch():
    small, large = (2, 2, 1), (3, 3, 1)
    made = Made(largest=8, shapes=(small, large))

    async def main():
        batcher = Batcher(made.runtime)
        requests = [images(value, shape=small if value % 2 else large) for value in range(6)]
        answers = await asyncio.gather(*map(batcher.submit, requests))
        await batcher.close()
        return answers

    assert [means(each) for each in asyncio.run(main())] == [[value] for value in range(6)]
    assert sorted(batch.shape for batch in made.batches) == [(4, *small), (4, *large)]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(delay_secs=-1), r"--delay-ms -1000: give 0 to 10000"),
        (Limits(queue_images=0), "--queue 0: give room for 1 image"),
        (Limits(concurrency=0), "--concurrency 0: give 1 to 64"),
    ],
)
def test_limits_out_of_range_are_one_line(limits, text):
    with pytest.raises(UserError, match=text):
        check_limits(limits)
    assert np.isfinite(limits.delay_secs)
