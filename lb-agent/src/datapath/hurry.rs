//! More of the processors for a few milliseconds, where every one of them may cost a packet.

/// The thread that has it runs before others, where that is allowed (CAP_SYS_NICE), until this is dropped.
#[derive(Debug)]
pub struct Hurry {
    /// The thread's own nice value.
    before: libc::c_int,
}

/// The most favourable one.
const FIRST: libc::c_int = -20;
/// This thread (setpriority(2), NOTES: nice values are a thread's own).
const SELF: libc::id_t = 0;

impl Hurry {
    pub fn begin() -> Self {
        // SAFETY: no pointers. An error looks like a nice value, which nothing depends on.
        let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, SELF) };
        // SAFETY: no pointers. Refused: then it takes as long as it takes.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, SELF, FIRST) };
        Self { before }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        // SAFETY: no pointers; to be less favoured is always allowed.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, SELF, self.before) };
    }
}
