"""The bucket that holds the model and the images, in an S3-compatible server."""

import os

import boto3
from botocore.config import Config

NAME = "digits"

# A client may be used by all threads at once; a session or a resource may not. So one client is
# made here, when the app is imported, and the session that made it is not used again.
client = boto3.session.Session().client(
    "s3",
    endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000"),
    # A real S3 wants a region and keys of yours; moto takes any.
    region_name="us-east-1",
    aws_access_key_id="any",
    aws_secret_access_key="any",
    config=Config(
        connect_timeout=2,
        read_timeout=10,  # a server that says nothing holds a thread no longer than this
        max_pool_connections=8,  # threads_per_process: a connection for each is kept open
        retries={"total_max_attempts": 2},
    ),
)
