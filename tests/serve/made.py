"""A runtime without a network: its logits say what it was given."""

import threading
import time

import numpy as np

from cnnjax.serve.runtime import Runtime, buckets_up_to


class Made:
    """Answers each image with its mean as the logit of class 0; notes the batches."""

    def __init__(self, largest=4, secs=0.0, shapes=((2, 2, 1),), parallel=True, lone_secs=1.0):
        self.batches, self.secs, self.fails = [], secs, False
        self.threads = []
        self.go = threading.Event()
        self.go.set()
        self.running = self.most_running = 0
        self.runtime = Runtime(
            source="made",
            platform="made",
            step=0,
            shapes=shapes,
            dtype="uint8",
            class_names=("a", "b"),
            num_logits=2,
            buckets=buckets_up_to(largest),
            call=self.call,
            prepare=lambda image: image,
            parallel=parallel,
            lone_secs=lone_secs,
        )

    def call(self, images):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.batches.append(images.copy())
        self.threads.append(threading.current_thread())
        assert self.go.wait(10)
        time.sleep(self.secs)
        self.running -= 1
        if self.fails:
            raise RuntimeError("it fails")
        logits = np.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], -1)
        return logits.astype(np.float32), (1 / (1 + np.exp(-logits))).astype(np.float32)


def images(*values, shape=(2, 2, 1)):
    """Images each of one gray level."""
    return np.stack([np.full(shape, value, np.uint8) for value in values])
