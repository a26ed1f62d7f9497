//! Service semantics where traffic is refused, gated or left alone, and what surrounds it: rules C, E, F4, F5 and J, IP
//! fragments and SCTP. Real agents, real packets.

#[path = "refusal/bed.rs"]
mod bed;
#[path = "refusal/c.rs"]
mod c;
#[path = "refusal/e.rs"]
mod e;
#[path = "refusal/f_loopback.rs"]
mod f_loopback;
#[path = "refusal/fragments.rs"]
mod fragments;
#[path = "refusal/j.rs"]
mod j;
#[path = "refusal/sctp.rs"]
mod sctp;
#[path = "refusal/service_cidr.rs"]
mod service_cidr;
