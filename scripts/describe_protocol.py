"""Writes cnnjax/serve/rpc/inference.binpb, what protoc says of inference.proto beside it.

    pip install grpcio-tools && python scripts/describe_protocol.py

The server builds its messages of that description, so that it depends on no version of generated
code: protobuf's own guarantee is that descriptions of old are read by new ones.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "cnnjax" / "serve" / "rpc"


def described(folder: Path = FOLDER) -> bytes:
    """Returns the serialized FileDescriptorProto of inference.proto."""
    import tempfile

    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as out:
        found = Path(out) / "set.binpb"
        words = ["protoc", f"-I{folder}", f"--descriptor_set_out={found}", "inference.proto"]
        if protoc.main(words):
            sys.exit(1)
        files = descriptor_pb2.FileDescriptorSet.FromString(found.read_bytes())
    return files.file[0].SerializeToString(deterministic=True)


if __name__ == "__main__":
    content = described()
    (FOLDER / "inference.binpb").write_bytes(content)
    print(f"written {FOLDER / 'inference.binpb'} ({len(content)} bytes)")
