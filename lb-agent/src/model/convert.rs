//! Kubernetes objects into the model.
