"""The engines that sample the policy's tokens."""
