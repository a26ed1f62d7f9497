//! One process of the test bed; told what to do by its argument (`traffic::task::Task` as JSON).

use anyhow::Context as _;
use lb_tests::{
    bench::connect::worker,
    janitor,
    traffic::{Task, client, server},
};

fn main() -> anyhow::Result<()> {
    let argument = std::env::args().nth(1).context("usage: netproc TASK; the test bed starts this")?;
    match serde_json::from_str(&argument).context("not a task")? {
        Task::Janitor => janitor::run(),
        Task::Serve { name, addrs } => server::serve(&name, &addrs),
        Task::Calls { call, count } => client::calls(&call, count),
        Task::Session(call) => client::session(&call),
        Task::Load(call) => client::load(&call),
        Task::Bulk { to, bytes } => client::bulk(to, bytes),
        Task::Connect(job) => worker::run(&job),
    }
}
