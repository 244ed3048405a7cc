"""An S3 server with one empty bucket: `python -m tests.train.s3_machine HOST`; prints its address, ends with its input."""

import os
import sys

from tests.conftest import BUCKET, one_request_at_a_time


def main() -> None:
    with one_request_at_a_time(sys.argv[1]) as endpoint:
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        print(endpoint, flush=True)
        sys.stdin.read()
    os._exit(0)  # threads of the server that still hold a connection


if __name__ == "__main__":
    main()
