"""Names the folder, or whatever a worker mounts there, in which all workers keep what releases have done.

    python deploy/results.py /results

Another storage block of the same name, such as an S3 bucket, does as well.
"""

import sys

from prefect.filesystems import LocalFileSystem

LocalFileSystem(basepath=sys.argv[1]).save("releases", overwrite=True)
