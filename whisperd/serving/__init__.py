"""The front ends: what they need of the daemon, and HTTP and Wyoming."""
