//! What is left out at present, said once per change.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    model::convert::{self, Reason},
    plan,
    source::ObjectRef,
};

/// Everything that objects ask for and do not get.
#[derive(Debug, Default)]
pub struct Rejections {
    /// By object, as of its last conversion.
    converted: BTreeMap<ObjectRef, Vec<convert::Rejection>>,
    planned: BTreeSet<plan::Rejection>,
}

impl Rejections {
    /// An object was converted, with these parts left out.
    pub fn converted(&mut self, object: ObjectRef, rejections: Vec<convert::Rejection>) {
        let known = self.converted.get(&object).map(Vec::as_slice).unwrap_or_default();
        for r in rejections.iter().filter(|r| !known.contains(r)) {
            tracing::warn!(object = %object, field = r.field, reason = %r.reason, "ignored");
        }
        if rejections.is_empty() {
            self.converted.remove(&object);
        } else {
            self.converted.insert(object, rejections);
        }
    }

    /// Something is left out of an object that was converted.
    pub fn has_converted(&self) -> bool {
        !self.converted.is_empty()
    }

    /// An object is gone.
    pub fn deleted(&mut self, object: &ObjectRef) {
        self.converted.remove(object);
    }

    /// What the planner leaves out now, all of it.
    pub fn planned(&mut self, rejections: Vec<plan::Rejection>) {
        let now: BTreeSet<_> = rejections.into_iter().collect();
        for r in now.difference(&self.planned) {
            let service = r.service().map(tracing::field::display);
            tracing::warn!(service, reason = %r, "not programmed as asked");
        }
        self.planned = now;
    }

    /// Numbers by reason, for metrics.
    pub fn by_reason(&self) -> BTreeMap<&'static str, i64> {
        let converted = self.converted.values().flatten().map(|r| conversion_reason(&r.reason));
        let planned = self.planned.iter().map(planning_reason);
        let mut counts = BTreeMap::new();
        for reason in converted.chain(planned) {
            *counts.entry(reason).or_insert(0) += 1;
        }
        counts
    }
}

fn conversion_reason(reason: &Reason) -> &'static str {
    match reason {
        Reason::Missing => "missing_field",
        Reason::NotAnAddress(_) => "not_an_address",
        Reason::NotAPrefix(_) => "not_a_prefix",
        Reason::SpecialAddress(_) => "special_address",
        Reason::WrongFamily { .. } => "wrong_family",
        Reason::SecondOfFamily(_) => "second_of_family",
        Reason::OutOfRange { .. } => "out_of_range",
        Reason::UnknownValue(_) => "unknown_value",
        Reason::BadName(_) => "bad_name",
        Reason::Duplicate => "duplicate",
    }
}

fn planning_reason(rejection: &plan::Rejection) -> &'static str {
    match rejection {
        plan::Rejection::FrontendTaken { .. } => "frontend_taken",
        plan::Rejection::ExternalIpNotAllowed { .. } => "external_ip_not_allowed",
        plan::Rejection::Full { .. } => "full",
        plan::Rejection::NameTooLong { .. } => "name_too_long",
        plan::Rejection::UnfilteredFamily { .. } => "unfiltered_family",
        plan::Rejection::TooManyCidrs { .. } => "too_many_service_cidrs",
    }
}
